// The AWS SDK for Go, version 2, driven as clients/driving.py says.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"
)

type object map[string]interface{}

var background = context.Background()

func shown(task types.BundleTask) object {
	return object{"id": *task.BundleId, "state": task.State}
}

func bundle(client *ec2.Client, rest []string, dryRun bool) (object, error) {
	s3 := &types.S3Storage{
		AWSAccessKeyId:        aws.String(os.Getenv("AWS_ACCESS_KEY_ID")),
		Bucket:                &rest[1],
		Prefix:                &rest[2],
		UploadPolicy:          []byte(rest[3]),
		UploadPolicySignature: &rest[4],
	}
	input := &ec2.BundleInstanceInput{InstanceId: &rest[0], Storage: &types.Storage{S3: s3}, DryRun: &dryRun}
	output, err := client.BundleInstance(background, input)
	if err != nil {
		return nil, err
	}
	return shown(*output.BundleTask), nil
}

func describe(client *ec2.Client, input *ec2.DescribeBundleTasksInput) ([]object, error) {
	output, err := client.DescribeBundleTasks(background, input)
	tasks := []object{}
	if err == nil {
		for _, task := range output.BundleTasks {
			tasks = append(tasks, shown(task))
		}
	}
	return tasks, err
}

func wait(client *ec2.Client, id string) (object, error) {
	input := &ec2.DescribeBundleTasksInput{BundleIds: []string{id}}
	waiter := ec2.NewBundleTaskCompleteWaiter(client, func(options *ec2.BundleTaskCompleteWaiterOptions) {
		options.MinDelay, options.MaxDelay = time.Second, time.Second
	})
	if err := waiter.Wait(background, input, time.Minute); err != nil {
		return nil, err
	}
	tasks, err := describe(client, input)
	return tasks[0], err
}

func cancel(client *ec2.Client, id string) (object, error) {
	output, err := client.CancelBundleTask(background, &ec2.CancelBundleTaskInput{BundleId: &id})
	if err != nil {
		return nil, err
	}
	return shown(*output.BundleTask), nil
}

func run(client *ec2.Client, action string, rest []string) (object, error) {
	switch action {
	case "bundle":
		return bundle(client, rest, false)
	case "dry-run":
		return bundle(client, rest, true)
	case "describe":
		filter := types.Filter{Name: aws.String("s3-prefix"), Values: rest}
		tasks, err := describe(client, &ec2.DescribeBundleTasksInput{Filters: []types.Filter{filter}})
		return object{"tasks": tasks}, err
	case "wait":
		return wait(client, rest[0])
	case "cancel":
		return cancel(client, rest[0])
	default:
		return object{"version": aws.SDKVersion}, nil
	}
}

func main() {
	client := ec2.New(ec2.Options{
		Region:           os.Getenv("AWS_DEFAULT_REGION"),
		EndpointResolver: ec2.EndpointResolverFromURL(os.Args[2]),
		Retryer:          aws.NopRetryer{},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			key, secret := os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")
			return aws.Credentials{AccessKeyID: key, SecretAccessKey: secret}, nil
		}),
	})
	answer, err := run(client, os.Args[1], os.Args[3:])
	var refusal smithy.APIError
	if errors.As(err, &refusal) {
		answer = object{"error": refusal.ErrorCode()}
	} else if err != nil {
		panic(err)
	}
	json.NewEncoder(os.Stdout).Encode(answer)
}
